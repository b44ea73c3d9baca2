"""Doing the work of a declared process: what it is on a main dataset, its blocks, its loop, how it ends."""
