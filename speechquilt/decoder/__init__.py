"""Speech tokens -> waveform: tokens to log-mel frames, log-mel frames to samples, both as they come."""
