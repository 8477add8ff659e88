-- `run status` asks who measured a release; without this it reads every contribution of the run for each.
CREATE INDEX contributions_by_release ON contributions (run, release_digest);
