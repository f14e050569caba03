"""The machine and its files: processes, disks, memory, interruptions, progress."""
