"""What every server of the package needs: a socket to listen on, and limits on what a request brings."""
