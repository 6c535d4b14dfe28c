"""The doors of the project: everything that it reads, a module a subject."""
