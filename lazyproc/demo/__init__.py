"""The parts of ``lazyproc demo``: a simulated band-excitation scan, the fit of an oscillator, maps beside the truth."""
