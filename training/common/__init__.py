"""Parts that several commands share: settings, devices, processes, files, plots."""
