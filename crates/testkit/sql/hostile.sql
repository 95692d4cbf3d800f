-- Settings of roles and databases that would make a careless dump fail or silently lose rows.
-- They beat the configuration file and the command line; only what a client sends at connect beats them.
ALTER ROLE postgres SET zero_damaged_pages = on;
ALTER ROLE postgres SET lock_timeout = '1ms';
ALTER DATABASE sales SET default_transaction_read_only = on;
ALTER DATABASE sales SET row_security = on;
ALTER ROLE postgres IN DATABASE sales SET role = app_reader;
ALTER DATABASE crm SET statement_timeout = '1ms';
ALTER DATABASE crm SET session_preload_libraries = 'no_such_library';
ALTER DATABASE crm SET search_path = nowhere;
ALTER DATABASE warehouse SET DateStyle = 'SQL, DMY';
ALTER DATABASE warehouse SET extra_float_digits = -15;
ALTER DATABASE warehouse SET bytea_output = 'escape';
