"""Feed the project what it should not be fed: damaged files, kills, full disks, hostile prompts."""
