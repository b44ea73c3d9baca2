"""HDF5 files: the USID model, where bytes lie, reading positions, committing blocks. No Dask."""
