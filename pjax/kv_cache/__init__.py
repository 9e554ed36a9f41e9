"""Pages of the KV cache: who owns which, which are found again, which are saved in host memory. Plain Python and numpy."""
