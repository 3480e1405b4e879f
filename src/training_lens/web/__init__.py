"""What every server of the package needs: a socket to listen on, and a limit on the size of a request."""
