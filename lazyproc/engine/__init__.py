"""Running blocks: the block function, the graph and the schedulers. No h5py."""
