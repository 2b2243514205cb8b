"""What a stranger brings, each in a file of at most 30 lines and with public names only, used from end to end."""
