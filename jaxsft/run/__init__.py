"""A run on machines and disks: its job, devices, processes, signals, checkpoints and log."""
