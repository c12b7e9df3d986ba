// Package postgres is one PostgreSQL server: the running one that is looked
// at before a cut, and the copy that is prepared, isolated, started and
// stopped after a restore.
//
//	Connect → Inspect → Preflight → FlushedRecordEnd      (production: only read)
//	StartBackup → Check → Stop | Abort                    (production: backup mode, in one session)
//	Prepare → Start → Instance → Stop                     (a copy: below its own folder)
//
// What always holds: no program runs through a shell; nothing outside the
// root folder of a copy is written, neither by this package nor by the server
// it starts; a signal is sent only to a process that was seen to be a postgres
// working in the data directory meant. Major versions 13 and later.
package postgres
