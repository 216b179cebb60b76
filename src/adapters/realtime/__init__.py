"""Socket.IO over Engine.IO: packets, connections and the buffers of their clients."""
