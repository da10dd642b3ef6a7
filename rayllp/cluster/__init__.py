"""Worker processes: the Ray actors (or MPI processes) that own blocks of layers, where they run, and how they are connected."""
