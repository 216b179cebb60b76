ALTER TABLE generations ADD COLUMN free INTEGER NOT NULL DEFAULT 0;  -- the work of its present stage costs nothing
