"""Jobs and who does them: this process, or Ray's. No pytest."""
