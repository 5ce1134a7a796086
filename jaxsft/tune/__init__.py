"""Many runs for one answer: cross-validation, a range test of the rate, a search for the best settings."""
