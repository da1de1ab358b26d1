"""`python -m toast`, for launchers of processes, and where the command itself is not on the path."""

from toast.cli import main

if __name__ == "__main__":
    main()
