"""DomainBed with fastdg behind its algorithms: ``python -m fastdg.domainbed``, see `__main__`."""
