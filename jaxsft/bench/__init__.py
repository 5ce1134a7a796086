"""What is measured, each by a command of `python -m jaxsft.bench`; nothing is timed in tests."""
