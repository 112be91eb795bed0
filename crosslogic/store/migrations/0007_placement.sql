-- Where a node's machine is and what it is, as its cloud says; empty until it runs.
ALTER TABLE nodes
    ADD COLUMN cloud         TEXT NOT NULL DEFAULT '',
    ADD COLUMN zone          TEXT NOT NULL DEFAULT '',
    ADD COLUMN instance_type TEXT NOT NULL DEFAULT '',
    ADD COLUMN cloud_region  TEXT NOT NULL DEFAULT '';           -- the cloud's name of it; `region` is ours

-- The names that Google Cloud and Azure have for the same places: clients may use them, and nodes are launched there.
UPDATE regions SET aliases = '{ap-south-1,asia-south1,centralindia}' WHERE name = 'in-mumbai' AND aliases = '{ap-south-1}';
UPDATE regions SET aliases = '{us-east-1,us-east4,eastus}' WHERE name = 'us-east' AND aliases = '{us-east-1}';
UPDATE regions SET aliases = '{eu-central-1,europe-west3,germanywestcentral}'
    WHERE name = 'eu-west' AND aliases = '{eu-central-1}';
UPDATE regions SET aliases = '{ap-southeast-1,asia-southeast1,southeastasia}'
    WHERE name = 'ap-southeast' AND aliases = '{ap-southeast-1}';
