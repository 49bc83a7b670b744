"""An inference server: sessions behind batchers, behind the Open Inference Protocol v2 over REST and gRPC."""
