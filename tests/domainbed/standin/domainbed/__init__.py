"""A stand-in for DomainBed: its interface, as far as fastdg and its scripts use it, with networks
small enough for tests. Algorithms are written down as plainly as can be, to compare with."""
