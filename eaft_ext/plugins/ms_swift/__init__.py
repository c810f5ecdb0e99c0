"""ms-swift puts this folder first on ``sys.path``: nothing here has the name of a library."""
