"""What several commands share: devices, processes, files, plots."""
