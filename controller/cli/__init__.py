"""``drctl``: the one command for people. ``main`` mounts the groups and turns errors into sentences and exit codes.

``session`` holds the global options, ``client`` speaks to controllers, ``render`` prints documents (the lab uses it too),
``look`` is everything that only reads, ``plans`` is plan, approve and promote, ``ops`` is serve, config and
version, ``lab`` is the lab.
"""
