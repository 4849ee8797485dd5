"""Engines: what carries the messages between the rounds and the clients.

`local` is the one in this process; `flower`, for clients on machines of their own, stands on `flower_link` (the
server's connection, with the limits in `flower_runtime`), `flower_node` (a client's), `flower_private` (what of Flower
is not documented) and `flower_recipe` (how an operator starts them).
"""
