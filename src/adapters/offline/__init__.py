"""The offline editor and face swap: free, and they say so."""
