"""The expert layer: routers make routing plans, dispatchers move rows to the ranks of their experts, experts compute. A
new routing method is one class here and one line in router_registry.py. Imports core, config, parallel and model.
"""
