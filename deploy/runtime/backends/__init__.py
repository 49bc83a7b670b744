"""The backends, one file each, which imports its library at the top. `deploy.runtime.catalog` lists them.

Each file has two functions, `version` and `open_session`: see `deploy.runtime.load.BackendModule`.
"""
