"""What every part of Baton agrees on: requests, wire messages, leases, hand-off, errors. No torch here."""
