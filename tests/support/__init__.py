"""What several tests share: worlds to run a contract in, and proxies that break things."""
