"""An editor and a face swap that run locally without an AI, for development and demos."""
