"""The expert layer: routers plan, dispatchers carry rows, experts compute. A new routing idea is one class here and one
line in router_registry.py.
"""
