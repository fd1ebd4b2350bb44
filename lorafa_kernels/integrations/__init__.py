"""Other libraries' models on these kernels. Each module imports its library where it is used."""
