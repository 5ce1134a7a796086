"""The report on a run, or on several side by side: one HTML file, to be opened without a server or a network."""
