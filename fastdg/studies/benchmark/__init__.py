"""A benchmark of all algorithms on small data sets of several domains, by DomainBed's protocol."""
