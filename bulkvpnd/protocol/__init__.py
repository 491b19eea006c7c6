"""The wire protocol, pure: bytes in, bytes out.

Nothing here imports gevent, opens a socket, reads a clock or logs; randomness and time are arguments.
"""
