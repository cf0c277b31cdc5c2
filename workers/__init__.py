"""The queue's side: delivery by RQ, the worker and its work-horses, the processes' supervision.

Redis delivers and holds nothing that matters; what is true stands in the registry's SQL.
"""
