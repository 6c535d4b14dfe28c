"""Run the command line as `python -m gmflow_core`, as `gmflow` does."""

from .cli import main

if __name__ == "__main__":
    main()
