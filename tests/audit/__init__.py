"""Known vulnerabilities of what is locked: ``make audit``."""
