"""lazyproc: process big spectroscopic and imaging files, position by position, lazily, from a laptop to a cluster."""
