"""The expert layer: routers make routing plans, dispatchers send copies of tokens (rows) to the ranks of their experts,
and experts process the rows. To add a routing method, write one class here and add one line in router_registry.py.
Imports core, config, parallel and model.
"""
