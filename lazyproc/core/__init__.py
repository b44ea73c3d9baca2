"""Pure values and arithmetic: no HDF5, no Dask, no files."""
