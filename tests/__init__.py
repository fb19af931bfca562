"""The tests; each folder mirrors one of the project's."""
