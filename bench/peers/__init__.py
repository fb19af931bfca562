"""Baton beside other servers: install them, start them, and measure all on the same cores in turns."""
