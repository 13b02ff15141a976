"""The device service: several processes share one chip, protected from one another.

Enters: connections over a Unix socket, launches as plain data; tensors lie in memory that both
sides map and never travel. Leaves: results, refusals in clear sentences, figures about everybody.
`server` is the machine's side, `remote` the client's; both speak `protocol`.
"""
