-- Whose store it is: one row once a coordinator with identities has served it. A process with others, or with none, would
-- publish releases that its devices refuse, and obey whoever reaches it: it refuses to start.
CREATE TABLE claims (
  id INTEGER PRIMARY KEY CHECK (id = 1),
  authority TEXT NOT NULL,       -- SHA-256 of its certificate
  release_key TEXT NOT NULL      -- the public key that verifies its releases
);
