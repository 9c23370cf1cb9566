"""Text -> speech with word times: engines that need no network, and a bank that makes many voices of a few."""
