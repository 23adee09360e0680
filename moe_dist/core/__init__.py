"""The values and utilities that all rooms share: the batch, routing plans and records, errors, strict settings, files,
seeding, parameter name patterns and compiled functions. Imports no other room.
"""
